"""Words of a command line."""


def last_of_each(words):
    """The words with the last value of each key, as `compose` reads them; a command line refuses two."""
    return list({str(word).partition("=")[0]: str(word) for word in words}.values())

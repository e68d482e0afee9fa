"""What can be measured on a trained decoder, knowing nothing of training."""

"""What is learned in pre-training, one file for each family of models; task.py says what a task is."""

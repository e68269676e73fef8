"""Images for training: where they come from, what is done to them, and in which order they come.

reading.py       image files: found, decoded, kept in memory, split
photos.py, shards.py, scenes.py, masks.py    the sources that are more than a folder of images
augment.py       random crops and flips
pretraining.py   images for pre-training; labelled.py, with classes; segmented.py, with a class for each pixel
samples.py       what all data sets and batches have in common
loading.py       the order of samples, and the processes that load them
"""

"""What is learned, with its options; `train.engine.task` says what a task is.

pretraining.py    what masked.py, autoregressive.py and tokenizer.py share; families.py finds a model's task
transfer.py       what classification.py and segmentation.py share, which start from an encoder
"""

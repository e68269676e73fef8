"""What every training script runs on, whatever it trains.

config.py      the options that all scripts share
task.py        what a run learns, as the others see it
run.py         reads the options, opens the run's folder, trains, says what went wrong
loop.py        steps, skipped steps, logs, signals
evaluation.py  a pass over the held-out images
results.py     what a finished run leaves
optimizers.py  AdamW and Muon, with R or without
checkpoint.py, run_folder.py    what a run keeps on disk
processes.py   this process among the others
energy.py      joules and CO2
plots.py, correlations.py       pictures
schedule.py    the learning rate
"""

"""What every training script runs on, whatever it trains.

config.py      the options that all scripts share
run.py         reads the options, opens the run's folder, trains, reports
loop.py        steps, skipped steps, logs, signals
checkpoint.py, run_folder.py    what a run keeps on disk
processes.py   this process among the others
energy.py      joules and CO2
plots.py, correlations.py       pictures
schedule.py    the learning rate
"""

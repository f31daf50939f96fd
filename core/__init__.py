"""What every training script needs and no paper describes: data sets, a run's folder, the machine."""

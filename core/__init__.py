"""What every training script needs and no paper describes: data, folders, files, the machine."""

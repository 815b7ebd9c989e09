"""What must survive: the database, the highest round, the model files, the spool of updates."""

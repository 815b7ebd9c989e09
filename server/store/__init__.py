"""What must survive: the database, the model files, the spool of updates."""

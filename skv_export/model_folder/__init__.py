"""An exported model folder: its files and configurations, written, read, fetched and pushed."""

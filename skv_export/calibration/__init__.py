"""Constants that quantize keys for the queries that read them: measured on text, solved for, kept in a file."""

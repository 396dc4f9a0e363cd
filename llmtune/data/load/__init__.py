"""Make the batches of one rank from tokenized rows."""

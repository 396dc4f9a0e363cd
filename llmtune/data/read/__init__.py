"""Sources become blocks of rows: files, folders, URLs, data sets of the hub."""

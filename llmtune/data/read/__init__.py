"""Read sources (files, folders, URLs, data sets of the hub) as blocks of rows."""

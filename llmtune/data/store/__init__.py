"""Keep tokenized rows on disk: mix, pack and read them."""

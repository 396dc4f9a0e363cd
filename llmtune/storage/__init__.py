"""Files: written whole or not at all, locked, hashed, named, copied; and the formats that are
llmtune's own.
"""

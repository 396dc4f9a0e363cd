"""The phases of a rank: the record that its supervisor reads, and the seconds of each."""

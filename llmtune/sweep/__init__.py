"""Search settings: several trainings, each in a run folder of its own."""

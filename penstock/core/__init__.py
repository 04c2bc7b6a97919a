"""What decides. Pure: takes `now` and a random generator, returns effects, never awaits."""

"""What every algorithm must hold: a federation in exact arithmetic, and a table row for each."""

"""What is done to a teacher's answer before a loss sees it: pure functions of arrays."""

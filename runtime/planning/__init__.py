"""What is asked for (`config`), what the machine has, and what follows from both (`plan`)."""

"""What every room needs to lose nothing."""

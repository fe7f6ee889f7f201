"""What turns plans into batches."""

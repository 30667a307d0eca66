"""What tests share: cases, models, backends, and programs that they run in a process of their own."""

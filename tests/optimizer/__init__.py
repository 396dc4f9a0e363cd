"""What is trained, and how adapters are attached, named and stored."""

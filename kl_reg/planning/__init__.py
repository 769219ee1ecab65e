"""What a configuration needs and costs on machines that nobody has rented yet: ahead-of-time compilation."""

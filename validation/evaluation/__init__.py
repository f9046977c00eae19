"""What models are asked, their answers, and how answers are scored."""

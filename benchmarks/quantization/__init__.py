"""What int4 costs a real chat model, by quantizer and by tool."""

"""What travels: messages, frames, arrays, spaces, subjects, parts. No I/O and no clock."""

"""A sweep as programs that run apart: planned, run, watched and gathered through files of its directory."""

"""Write one self-contained HTML page on a finished run: metrics, curves, item vectors."""

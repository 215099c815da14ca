"""content/encoders"""

"""Parts that several rooms' tests share."""

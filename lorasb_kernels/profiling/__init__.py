"""What an adapted layer costs: counts, predictions, measurements, records of results."""

"""What an adapted layer costs: counted, predicted, measured, recorded and shown."""

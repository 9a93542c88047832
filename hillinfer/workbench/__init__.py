"""What a person looks at: figures and reports. The only place that imports plotly."""

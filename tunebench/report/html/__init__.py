"""The report as one HTML page: content.py prepares its data, charts.py its charts, page.py fills the template."""

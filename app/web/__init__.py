"""The web app: a core that knows no page (jobs, photos, adapters, pictures), and thin views on it."""

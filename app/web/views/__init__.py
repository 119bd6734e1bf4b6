"""The parts of the page. Each makes its controls and says what they do; what is done lies in `app/web`."""

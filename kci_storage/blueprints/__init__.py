"""Views: gather what a request says, call a service, answer."""

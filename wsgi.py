"""What gunicorn serves: ``gunicorn wsgi:app``."""

from kci_storage.app import create_app

app = create_app()

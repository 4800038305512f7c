"""Methods that change how a built model is trained."""

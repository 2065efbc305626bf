"""Moving weights between formats, streamed tensor by tensor and verified at every step."""

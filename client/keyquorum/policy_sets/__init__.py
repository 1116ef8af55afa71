"""The controls that come with keyquorum (``NAME.yaml``), each with scenarios to pass (``NAME.scenarios.yaml``)."""

"""`sbs plan`: what a configuration would cost on TPUs that are not here, by their compiler."""

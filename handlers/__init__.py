"""The application: plain functions and the table that makes a pipeline of them."""

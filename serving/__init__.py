"""How people get statements: best of N, HTTP interface, Ray Serve application. Importing it loads no model code."""

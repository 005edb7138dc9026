"""WebShop (Yao et al. 2022) without a web server and without Java: the original's pages, goals, prices and rewards."""

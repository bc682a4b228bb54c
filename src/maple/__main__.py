"""`python -m maple`, which `accelerate launch -m maple` needs."""

from maple.cli import main

if __name__ == "__main__":
    main()

"""What every command needs: how it speaks, small files, errors meant for people."""

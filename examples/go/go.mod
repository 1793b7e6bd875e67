module tidegate-examples

go 1.21

from rtk.cli import main

raise SystemExit(main())
